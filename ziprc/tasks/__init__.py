"""What is asked, and by which split: one module a task, `ziprc.tasks.base.get_task` to find it by its name."""
