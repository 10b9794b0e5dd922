"""MLflow as a mirror of the run folder: it can be late, away or missing, and training never waits for it."""

from arae.tracking.mirror import send_pending, tracking_uri
from arae.tracking.operations import Family, metric_name, record_names
from arae.tracking.server import ui
from arae.tracking.tracker import Tracker

__all__ = ["Family", "Tracker", "metric_name", "record_names", "send_pending", "tracking_uri", "ui"]
