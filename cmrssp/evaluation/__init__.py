"""Scores, statistics, tables and pictures; predictions of new cines."""
