"""What to run next, and which answer to give: ours, the published one, and their competitors."""
