"""Models that run elsewhere: how the service is, and work that is sent without waiting."""

from .jobs import Job, job, submit
from .service import status, versions

__all__ = ["Job", "job", "status", "submit", "versions"]
