"""Finding moments in hours of video: windows that are indexed once, scored for a question, and looked at closely."""
