"""The live page about a folder of runs."""
