# syntax=docker/dockerfile:1

# Any Debian or Ubuntu image with Python 3.11 or later works; without a GPU use debian:bookworm-slim.
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

# Dependencies first: their layer is large and is rebuilt only when requirements.lock changes.
COPY requirements.lock /opt/requirements.lock
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --require-hashes --requirement /opt/requirements.lock \
    && useradd --create-home --shell /usr/sbin/nologin kd \
    && mkdir --parents /data /cache /app/logs \
    && chmod 1777 /cache /app/logs

# The code, the configurations and commandline_args.txt; see .dockerignore.
COPY . .

USER kd
# /data: images. /app/logs: experiments. /cache: downloaded weights and data sets.
VOLUME ["/data", "/app/logs", "/cache"]
EXPOSE 6006
ENTRYPOINT ["python", "experiment.py"]
