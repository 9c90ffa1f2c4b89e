"""What kiln targets: hardware facts, profiles of machines, and the errors all share."""
