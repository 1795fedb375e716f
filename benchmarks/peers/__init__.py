"""Who is measured: a short file each, written as its own documentation advises."""
