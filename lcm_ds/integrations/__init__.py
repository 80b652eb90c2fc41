"""lcm-ds on engines of others: Ray and datatrove."""
