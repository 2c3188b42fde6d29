"""What people look at: the report, the pages of `ziprc inspect`, the terminal."""
