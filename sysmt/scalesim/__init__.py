"""SCALE-Sim's files in, its reports out. Never imports torch."""
