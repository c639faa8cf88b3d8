"""Influence functions: against training again, and beside other libraries."""
