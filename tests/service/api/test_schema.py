"""The OpenAPI schema against the service: cases made from it, and whether the answers keep to it.

CGAN_SCHEMA_CASES says how many cases there are of each operation, in place of a few seconds' worth.
"""

import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

from tests.support.serving import Service
from tests.support.wire import LAST, ask

CASES = int(os.environ.get("CGAN_SCHEMA_CASES", "50"))
CONFIG = SchemathesisConfig.from_dict(
    {
        "checks": {
            # Which labels there are, and so how many images, depends on the model; and a
            # millisecond may not be enough. Other APIs say 400 where ours says 422.
            "positive_data_acceptance": {
                "expected-statuses": ["2xx", "400", "404", "406", "422", "504"],
            },
            "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "504"]},
            "negative_data_rejection": {
                "expected-statuses": ["400", "404", "405", "406", "414", "422"]
            },
        }
    }
)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_the_service_does_what_the_schema_says(service: Service, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{service.client.base_url}/openapi.json", config=CONFIG)
    operations: list[Any] = [found.ok() for found in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) > 4
    for operation in operations:
        if mode == GenerationMode.NEGATIVE and not operation.query:
            continue  # it takes nothing that could be wrong

        @settings(
            max_examples=CASES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
        )
        @given(operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            if str(case.query.get("per_class", "")).isdecimal():  # a million take a while
                case.query["per_class"] = int(case.query["per_class"]) % 20
            case.call_and_validate()

        check()
    assert ask(service, LAST)[0].status == 200
