"""What an artifact says of images."""

from tome_export.predict.main import PredictRequest, PredictResult, predict

__all__ = ["PredictRequest", "PredictResult", "predict"]
