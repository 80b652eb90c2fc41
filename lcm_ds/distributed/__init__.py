"""The processes of a job: their ranks, how they meet, collectives, and how they start on one host."""
