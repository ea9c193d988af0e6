"""Whether the words and masks are random: streams into batteries of tests, and statistics of masks."""
