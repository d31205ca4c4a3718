"""Questions put to a model by changing one thing and measuring again: channels, thresholds, which half is in 8 bit."""
