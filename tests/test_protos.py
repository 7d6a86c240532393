"""Our protobuf messages against Triton's published ones, byte for byte."""

import pytest

from servebench.protos import KSERVE

service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2", reason="tritonclient[grpc] is not installed")


def test_an_infer_request_is_tritons() -> None:
    def fill(message):  # type: ignore[no-untyped-def]
        message.model_name, message.model_version, message.id = "m", "3", "q1"
        message.parameters["priority"].int64_param = 2
        message.parameters["tag"].string_param = "x"
        message.parameters["off"].bool_param = False  # set to what is the default: still sent
        for number in range(2):
            tensor = message.inputs.add()
            tensor.name, tensor.datatype = f"X{number}", "FP32"
            tensor.shape.extend([1, -1, 300])
            tensor.parameters["b"].bool_param = True
            message.raw_input_contents.append(bytes([number]) * 5)
        return message

    ours = fill(KSERVE.ModelInferRequest()).SerializeToString(deterministic=True)
    theirs = fill(service_pb2.ModelInferRequest())
    assert service_pb2.ModelInferRequest.FromString(ours) == theirs
    assert KSERVE.ModelInferRequest.FromString(theirs.SerializeToString()).SerializeToString(deterministic=True) == ours


def test_a_reply_of_tritons_is_understood() -> None:
    theirs = service_pb2.ModelInferResponse(model_name="m", model_version="1", raw_output_contents=[b"\0" * 8])
    output = theirs.outputs.add(name="Y", datatype="FP32", shape=[2])
    output.contents.fp32_contents.extend([1.5, 2.5])
    ours = KSERVE.ModelInferResponse.FromString(theirs.SerializeToString())
    assert (ours.model_name, ours.outputs[0].name, list(ours.outputs[0].shape)) == ("m", "Y", [2])
    assert list(ours.outputs[0].contents.fp32_contents) == [1.5, 2.5]
    assert list(ours.raw_output_contents) == [b"\0" * 8]


@pytest.mark.parametrize(
    "name",
    ["ServerMetadataResponse", "ModelMetadataResponse", "ModelConfigResponse", "RepositoryIndexResponse", "ModelReadyResponse"],
)
def test_field_numbers_and_types_are_tritons(name: str) -> None:
    ours, theirs = getattr(KSERVE, name).DESCRIPTOR, getattr(service_pb2, name).DESCRIPTOR
    for field in ours.fields:
        published = theirs.fields_by_name[field.name]
        assert (field.number, field.type) == (published.number, published.type), field.name
