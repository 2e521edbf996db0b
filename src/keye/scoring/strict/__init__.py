"""What a reply answers: letters, spans, yes or no, numbers, short texts, or nothing. Nothing is drawn at random."""
