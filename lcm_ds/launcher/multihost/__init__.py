"""A run on several hosts over ssh: a supervisor in the launcher, an agent on each host."""
