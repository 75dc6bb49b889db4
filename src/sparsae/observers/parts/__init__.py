"""What trackers have in common."""
