"""`lcm-ds doctor`: what this machine has, and what would stop a run."""
