"""Feeds recorded input/output cases to keye and compares every number they hold."""
