"""Calibration calls of the Coordinator service, a thin shell around a CalibrationRegistry."""

from collections.abc import Iterator
from typing import NoReturn

import grpc

from kvstore_api.calibrations import DIGEST_BYTES, MAX_PIECE_BYTES
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_cluster.calibrations import CalibrationRecord, CalibrationRegistry
from kvstore_codec.errors import (
    CalibrationSizeError,
    CalibrationTooLargeError,
    CatalogueError,
    ClusterError,
    DamagedCalibrationError,
    UnknownCalibrationError,
)
from kvstore_service.grpc_server import parser, unary

_STATUS: dict[type[ClusterError], grpc.StatusCode] = {
    UnknownCalibrationError: grpc.StatusCode.NOT_FOUND,
    CalibrationSizeError: grpc.StatusCode.INVALID_ARGUMENT,
    CalibrationTooLargeError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DamagedCalibrationError: grpc.StatusCode.DATA_LOSS,
    CatalogueError: grpc.StatusCode.UNAVAILABLE,
}


class CalibrationService:
    def __init__(self, registry: CalibrationRegistry) -> None:
        self._registry = registry

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {
            "PutCalibration": grpc.stream_unary_rpc_method_handler(
                self.put,
                request_deserializer=pb.PutCalibrationRequest.FromString,
                response_serializer=pb.PutCalibrationReply.SerializeToString,
            ),
            "GetCalibration": grpc.unary_stream_rpc_method_handler(
                self.get,
                request_deserializer=parser(pb.GetCalibrationRequest),
                response_serializer=pb.GetCalibrationReply.SerializeToString,
            ),
            "FindCalibration": unary(self.find, pb.FindCalibrationRequest),
            "ListCalibrations": unary(self.list, pb.ListCalibrationsRequest),
        }

    def put(
        self, steps: Iterator[pb.PutCalibrationRequest], context: grpc.ServicerContext
    ) -> pb.PutCalibrationReply:
        first = next(steps, pb.PutCalibrationRequest())
        if first.WhichOneof("step") != "start":
            _refuse(context, "the steps of a calibration are start, data...; the first one was not a start")
        start = first.start
        record = CalibrationRecord(
            _digest(start.digest, context), _digest(start.model_digest, context), start.size_bytes
        )
        try:
            self._registry.put(record, _pieces(steps, context))
        except ClusterError as error:
            context.abort(_STATUS[type(error)], str(error))
        return pb.PutCalibrationReply()

    def get(
        self, request: pb.GetCalibrationRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GetCalibrationReply]:
        try:
            for piece in self._registry.pieces(_digest(request.digest, context)):
                yield pb.GetCalibrationReply(data=piece)
        except ClusterError as error:
            context.abort(_STATUS[type(error)], str(error))

    def find(
        self, request: pb.FindCalibrationRequest, context: grpc.ServicerContext
    ) -> pb.FindCalibrationReply:
        record = self._registry.find(_digest(request.model_digest, context))
        return pb.FindCalibrationReply(digest=record.digest if record else b"")

    def list(
        self,
        request: pb.ListCalibrationsRequest,  # noqa: ARG002
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.ListCalibrationsReply:
        return pb.ListCalibrationsReply(
            calibrations=[
                pb.CalibrationInfo(
                    digest=record.digest, model_digest=record.model_digest, size_bytes=record.size_bytes
                )
                for record in self._registry.records()
            ]
        )


def _pieces(steps: Iterator[pb.PutCalibrationRequest], context: grpc.ServicerContext) -> Iterator[bytes]:
    for step in steps:
        if step.WhichOneof("step") != "data":
            _refuse(
                context, "the steps of a calibration are start, data...; a step after the start was not data"
            )
        if len(step.data) > MAX_PIECE_BYTES:
            _refuse(context, f"a piece has {len(step.data)} bytes; at most {MAX_PIECE_BYTES}")
        yield step.data


def _digest(digest: bytes, context: grpc.ServicerContext) -> bytes:
    if len(digest) != DIGEST_BYTES:
        _refuse(context, f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
    return digest


def _refuse(context: grpc.ServicerContext, reason: str) -> NoReturn:
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
    raise AssertionError("abort raises")
