"""What all Kafka clients of a process have in common: how to connect, what errors mean, how much they may log."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kafka import errors as kafka_errors

from streamlearn.contract.config import KafkaConfig
from streamlearn.contract.errors import ConfigError, Retryable, Stuck, Unreachable


def connection_settings(config: KafkaConfig) -> dict[str, Any]:
    """What producer, consumers and admin client have in common."""
    settings: dict[str, Any] = {
        "bootstrap_servers": list(config.servers),
        "client_id": "streamlearn",
        "api_version": config.api_version,
        "bootstrap_timeout_ms": int(config.start_timeout_s * 1000),
        "request_timeout_ms": int(config.request_timeout_s * 1000),
        "security_protocol": config.security,
        # as in Kafka's own client; kafka-python's 30 s leave a broker alone that has long been back, while every request to it times out
        "reconnect_backoff_max_ms": 1000,
    }
    files = {"ssl_cafile": config.ssl_cafile, "ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile}
    for key, name in files.items():
        if name and not Path(name).is_file():
            raise ConfigError(f"log.kafka.{key} = {name!r}: no such file")
    settings |= {key: name for key, name in files.items() if name}
    if config.security.startswith("SASL"):
        settings |= {
            "sasl_mechanism": config.sasl_mechanism,
            "sasl_plain_username": config.sasl_username,
            "sasl_plain_password": _password(config),
        }
    return settings


def _password(config: KafkaConfig) -> str:
    if config.sasl_password_file:
        try:
            return Path(config.sasl_password_file).read_text().partition("\n")[0]
        except OSError as e:
            raise ConfigError(f"log.kafka.sasl_password_file = {config.sasl_password_file!r}: {e.strerror}") from e
    found = os.environ.get("STREAMLEARN_KAFKA_PASSWORD", "")
    if not found:
        raise ConfigError("log.kafka.security uses SASL, but there is neither log.kafka.sasl_password_file nor STREAMLEARN_KAFKA_PASSWORD")
    return found


class _AFewAMinute(logging.Filter):
    """kafka-python's sender has been seen to log a traceback 2,000 times a second."""

    def __init__(self, most: int = 10):
        super().__init__()
        self.most, self.count, self.since = most, 0, time.monotonic()

    def filter(self, record: logging.LogRecord) -> bool:
        if time.monotonic() - self.since > 60:
            self.count, self.since = 0, time.monotonic()
        self.count += 1
        return self.count <= self.most


def calm(noisy: logging.Logger) -> None:
    if not any(isinstance(f, _AFewAMinute) for f in noisy.filters):
        noisy.addFilter(_AFewAMinute())


@contextlib.contextmanager
def translated(config: KafkaConfig, doing: str, *, starting: bool = False) -> Iterator[None]:
    """Nothing of kafka-python's leaves the adapter."""
    where = ", ".join(config.servers)
    try:
        yield
    except (
        kafka_errors.AuthorizationError,
        kafka_errors.SaslAuthenticationFailedError,
        kafka_errors.UnsupportedSaslMechanismError,
        kafka_errors.UnrecognizedBrokerVersion,
    ) as e:
        raise ConfigError(f"Kafka ({where}): {doing}: {e}; look at log.kafka.security, the sasl_ keys and the brokers' ACLs") from e
    except (kafka_errors.RetriableError, kafka_errors.UnknownBrokerIdError, OSError) as e:  # a broker that has just gone is unknown
        if starting:
            raise Unreachable(
                f"Kafka ({where}): no broker answers within log.kafka.start_timeout_s = {config.start_timeout_s:g} s: {e}; "
                "look at log.kafka.servers and log.kafka.security"
            ) from e
        raise Retryable(f"Kafka ({where}): {doing}: {e}", after_s=2.0, on="broker") from e
    except kafka_errors.KafkaError as e:
        raise Stuck(f"Kafka ({where}): {doing}: {type(e).__name__}: {e}; the process starts anew") from e
