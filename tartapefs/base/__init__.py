"""Modules that know nothing of tapes: errors, text for people, processes, signals, files that commands write."""
