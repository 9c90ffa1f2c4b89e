"""What kiln targets: hardware facts, profiles of kinds of machine, and the errors everybody shares."""
