"""What knows nothing of tapes: errors, text for people, processes, signals, files that commands write."""
