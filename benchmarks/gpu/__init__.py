"""All that needs an accelerator, in parts that one call of minutes settles."""
