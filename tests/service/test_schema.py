"""The OpenAPI document: complete, and what the service answers, whatever is asked, is what it says."""

import shutil

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st

from .conftest import PROBLEM, _folder, in_process
from .test_privacy import offer_a_model

# What a browser asks for, and the document itself.
PAGE = {("GET", "/"), ("GET", "/page/{name}"), ("GET", "/openapi.json")}


@pytest.fixture(scope="module")
def served(written_lake):
    with _folder() as folder:
        shutil.copytree(written_lake, folder / "lake")
        offer_a_model(folder / "lake")
        with in_process(folder / "lake", "admin", max_wait="0.01", max_read="8KiB") as client:
            client.lake, client.written = folder / "lake", written_lake
            yield client


@pytest.fixture(scope="module")
def document(served):
    return served.get("/openapi.json").json()


def operations(document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_every_route_is_described(served, document):
    described = {(method, path) for method, path, _ in operations(document)}
    routes = {
        (method, route.path.replace(":path}", "}")) for route in served.app._app.routes for method in route.methods
    } - PAGE
    assert described == routes and len(described) > 10
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)
    for _, path, operation in operations(document):
        assert operation["summary"], path
        assert {"401", "403", "422", "429", "500"} <= operation["responses"].keys(), path
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ProblemBody"}, (path, status)
    assert set(document["components"]["schemas"]["ProblemBody"]["required"]) == PROBLEM


def test_every_route_has_examples_of_its_own_schema(document):
    """Of what must be asked, and of what is answered as JSON; of the rest where it helps."""
    import jsonschema

    def fits(example, schema):
        jsonschema.validate(example, schema | {"components": document["components"]})

    for method, path, operation in operations(document):
        for parameter in operation.get("parameters", ()):
            assert "example" in parameter or not parameter["required"], (method, path, parameter["name"])
            if "example" in parameter:
                fits(parameter["example"], parameter["schema"])
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]["application/json"]
            fits(content["example"], content["schema"])
        for status, answer in operation["responses"].items():
            content = answer.get("content", {}).get("application/json", {})
            if int(status) < 300 and content.get("schema"):
                fits(content["example"], content["schema"])


@pytest.mark.parametrize(
    "path", ["/v1/captures", "/v1/captures/{name}", "/v1/captures/{name}/samples", "/v1/captures/{name}/samples/{key}",
             "/v1/models", "/readyz", "/version"],
)  # fmt: skip
def test_examples_have_the_fields_that_answers_have(served, document, path):
    def fields(value):
        if isinstance(value, dict):
            return {name: fields(value[name]) if name == "captures" else None for name in value}
        return fields(value[0]) if isinstance(value, list) and value else None

    shown = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["example"]
    answered = served.get(path.format(name="cells", key="key-0003")).json()
    assert fields(shown) == fields(answered)


def fuzz(served, document, examples):
    """So many requests to every operation, right and wrong; returns how many in all."""
    schema = schemathesis.openapi.from_dict(document)
    checks = [
        schemathesis.checks.CHECKS.get_one(name)
        for name in (
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
        )
    ]
    sent, failures, seen = 0, [], set()
    how = settings(
        max_examples=examples, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    for result in schema.get_all_operations():
        operation = result.ok()

        def one(case):
            nonlocal sent
            names(case)
            try:
                response = call(served, case)
            except Exception as error:
                if type(error).__name__ != "InvalidURL":  # longer than the HTTP library sends
                    raise
                reject()
            sent += 1
            seen.add((case.operation.label, response.status_code))
            try:
                # The one model's tokenizer is not there, and its worker gives no sign of life for long.
                resolving = case.operation.label.endswith(":resolve") and response.status_code == 503
                assert response.status_code < 500 or (resolving and response.json()["type"] in ("store", "no_worker"))
                case.validate_response(response, checks=checks)
            except Exception as error:
                failures.append(
                    f"{case.operation.label}: {case.path_parameters} {case.query} {str(case.body)[:300]}\n{error}"
                )
                raise

        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
        if operation.body or operation.query or operation.path_parameters:
            strategy = st.one_of(strategy, operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
        try:
            how(given(strategy)(one))()
        except Exception as error:
            failures.append(f"{operation.label}: {type(error).__name__} {error}")
    assert not failures, "\n\n".join(failures[:5])
    return sent, seen


def names(case):
    """Half of what is asked for is there: else every answer would be a 404."""
    pick = len(repr((case.path_parameters, case.query, case.body))) % 8
    there = ("cells", "tokens", "both", "exact")
    if isinstance(case.path_parameters, dict) and "name" in case.path_parameters and pick < 5:
        case.path_parameters["name"] = there[pick % 4]
        if "path" in case.path_parameters and pick < 3:
            case.path_parameters["path"] = "zarr.json"
        if "key" in case.path_parameters and pick < 3:
            case.path_parameters["key"] = "key-0003"
    if isinstance(case.query, dict) and "site" in case.query and pick < 5:
        case.query["site"] = ("embed", "mlp_act")[pick % 2]
    if isinstance(case.body, dict) and "inputs" in case.body and pick < 5:
        case.body["inputs"] = [{"token_ids": [1, 2, pick]}]
    if isinstance(case.body, dict) and "capture" in case.body and pick < 5:
        case.body["capture"] = there[pick % 4]
        case.body["site"] = ("embed", "mlp_act")[pick % 2]


def call(served, case):
    """One request, in this process. What it removes is put back."""
    sent = case.as_transport_kwargs(base_url="http://127.0.0.1", headers={"Authorization": f"Bearer {served.key}"})
    body = {name: sent[name] for name in ("json", "data", "content", "files") if sent.get(name) is not None}
    if "data" in body:
        body["content"] = body.pop("data")
    headers = {name: str(value).encode("utf-8", "replace") for name, value in (sent.get("headers") or {}).items()}
    response = served.request(sent["method"], sent["url"], params=sent.get("params"), headers=headers, **body)
    if case.method == "DELETE" and response.status_code == 204:
        for folder in served.written.iterdir():
            if not (served.lake / folder.name).exists():
                shutil.copytree(folder, served.lake / folder.name)
                served.parts.lake.refresh(folder.name)
    return response


def test_what_is_answered_is_what_the_document_says(served, document):
    """No 5xx, no status, type or body that is not described; a few hundred requests."""
    sent, seen = fuzz(served, document, 12)
    print(f"{sent} requests; {sorted(seen)}")
    assert sent > 200
    assert {200, 404, 422} <= {status for _, status in seen}


@pytest.mark.slow
def test_ten_thousand_requests(served, document):
    # Of an operation without parameters there are few different ones.
    sent, seen = fuzz(served, document, 13_000 // len(list(operations(document))))
    print(f"{sent} requests")
    assert sent >= 10_000 and {200, 404, 409, 422} <= {status for _, status in seen}
