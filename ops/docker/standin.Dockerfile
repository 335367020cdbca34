# Stand-ins for servers whose images cannot be pulled where containers are tested: Debian's registry (distribution 2.8), Prometheus and
# Alertmanager, and moto's S3.  For ops/docker/e2e.py only; never for a deployment.
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm
# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update -q \
 && apt-get install -y -q --no-install-recommends docker-registry prometheus prometheus-alertmanager wget \
 && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/constraints.txt
RUN python -m venv /opt/moto \
 && /opt/moto/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt 'moto[s3]' flask flask-cors
USER 10001:10001
CMD ["/bin/false"]
