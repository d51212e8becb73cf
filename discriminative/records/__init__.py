"""What a run leaves behind: files, pictures, tables, reports."""
