"""Makes what the runners read: plans, quantizes, exports, builds, checks and packs."""
