"""Commands on finished datasets: index, inspect, fit-normalizer."""
