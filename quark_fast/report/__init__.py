"""A run's files as report.html, tables and plots."""
