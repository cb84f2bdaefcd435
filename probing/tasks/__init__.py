"""Question sets, and the judges that mark their answers."""

from hiddenlake.probing.tasks.cities import CitiesTask, cities
from hiddenlake.probing.tasks.file import FileTask, file_task
from hiddenlake.probing.tasks.registry import TASKS, load_task

__all__ = ["TASKS", "CitiesTask", "FileTask", "cities", "file_task", "load_task"]
