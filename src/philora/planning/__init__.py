"""What a run will take: memory, time, steps, and what its machine lacks."""
