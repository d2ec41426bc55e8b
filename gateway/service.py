"""Our own front door: baton.v1.InferenceService."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING

import grpc

from core.errors import RequestError
from protos.baton.v1 import inference_pb2, inference_pb2_grpc
from runtime import rpc

if TYPE_CHECKING:
    from gateway.gateway import Gateway

SERVICE = "baton.v1.InferenceService"


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """See protos/baton/v1/inference.proto."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        try:
            refuse = partial(rpc.refuse, context)
            async with aclosing(self._gateway.generate(request, context.time_remaining(), refuse)) as responses:
                async for response in responses:
                    yield response
        except RequestError as error:
            await rpc.refuse(context, error)

    async def Abort(
        self, request: inference_pb2.AbortRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.AbortResponse:
        return inference_pb2.AbortResponse(aborted=self._gateway.abort(request.request_id))

    async def GetModelInfo(
        self, request: inference_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GetModelInfoResponse:
        try:
            self._gateway.intake.model(request.model)
        except RequestError as error:
            await rpc.refuse(context, error)
        facts = self._gateway.facts
        return inference_pb2.GetModelInfoResponse(
            model=facts.name,
            fingerprint=facts.fingerprint,
            context_tokens=facts.context,
            vocabulary=facts.vocabulary,
            eos_token_ids=facts.eos,
            chat_template=self._gateway.chat_template,
            constrains=self._gateway.constrains,
        )

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=[self._gateway.facts.name])

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        intake = self._gateway.intake
        try:
            intake.model(request.model)
            kind = request.WhichOneof("prompt")
            ids = await self._gateway.aside(request, intake.tokens, kind, request)
            return inference_pb2.TokenizeResponse(token_ids=ids)
        except RequestError as error:
            await rpc.refuse(context, error)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.DetokenizeResponse:
        intake = self._gateway.intake
        try:
            intake.model(request.model)
            ids = intake.text_ids(request.token_ids)
        except RequestError as error:
            await rpc.refuse(context, error)
        return inference_pb2.DetokenizeResponse(text=self._gateway.tokenizer.decode(ids))
