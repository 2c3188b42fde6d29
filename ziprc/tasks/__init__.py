"""What is asked, and by which split. `get_task` is the only lookup."""

from ziprc.tasks.base import Prompt, Task, TeachingTask, Trace, get_task

__all__ = ["Prompt", "Task", "TeachingTask", "Trace", "get_task"]
