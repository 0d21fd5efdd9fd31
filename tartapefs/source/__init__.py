"""The source folder: the only code that opens what lies in it, and the comparison that drift is judged by."""
