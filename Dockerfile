# syntax=docker/dockerfile:1

# Any Debian or Ubuntu with Python 3.11 or later will do: without a GPU, debian:bookworm-slim.
ARG BASE_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
FROM ${BASE_IMAGE}

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONPATH=/app \
    KD_CACHE=/cache/kd \
    TORCH_HOME=/cache/torch \
    HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib
WORKDIR /app

# The dependencies come before the code: their layer is large, and is built again only when requirements.lock changes.
COPY requirements.lock /opt/requirements.lock
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --require-hashes --requirement /opt/requirements.lock \
    && useradd --create-home --shell /usr/sbin/nologin kd \
    && mkdir --parents /data /cache /app/logs \
    && chmod 1777 /cache /app/logs

# What .dockerignore lets through: the code, its configurations and its file of flags.
COPY . .

USER kd
# /data: the images. /app/logs: what runs leave. /cache: weights and data sets that were fetched.
VOLUME ["/data", "/app/logs", "/cache"]
EXPOSE 6006
ENTRYPOINT ["python", "experiment.py"]
