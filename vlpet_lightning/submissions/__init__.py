"""Result files of the benchmarks' evaluation servers: writing, reading and checking them."""

from vlpet_lightning.submissions.formats import FORMATS, Format, SubmissionError, server_id

__all__ = ["FORMATS", "Format", "SubmissionError", "server_id"]
