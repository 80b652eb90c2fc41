"""A run on several hosts over ssh: a supervisor here, an agent on each host."""
