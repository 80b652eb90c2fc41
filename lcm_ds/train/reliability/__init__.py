"""What keeps a run right or ends it in order: loss guard, watchdog, run lock, stop requests."""
