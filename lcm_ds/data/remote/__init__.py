"""Datasets at URLs: fetching, and a cache on disk that all ranks of a host share."""
