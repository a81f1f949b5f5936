"""Token merging itself: schedules, plans, the match and merge operators. Knows only torch."""
