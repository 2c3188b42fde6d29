"""What do the numbers mean?"""
