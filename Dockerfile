# Two images: `service` (the last, so the one that is built by default) and `training`.
# PyTorch's wheel on amd64 Linux is the CUDA build, which a GPU host needs; without a GPU the same
# one runs, and only leaves its CUDA part idle.

# The dependencies alone, so that no other change of pyproject.toml or the code installs them again.
FROM python:3.11-slim-bookworm AS requirements
WORKDIR /srv
COPY pyproject.toml .
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    open('service.txt', 'w').write('\n'.join(project['dependencies'])); \
    open('training.txt', 'w').write('\n'.join(project['optional-dependencies']['train']))"


# Every dependency has a wheel: nothing is compiled, here or later.
FROM python:3.11-slim-bookworm AS service-packages
COPY --from=requirements /srv/service.txt /tmp/
RUN python -m venv --without-pip /opt/venv \
    && python -m pip --python /opt/venv/bin/python install --no-cache-dir --only-binary :all: -r /tmp/service.txt


FROM service-packages AS training-packages
COPY --from=requirements /srv/training.txt /tmp/
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir --only-binary :all: -r /tmp/training.txt


FROM python:3.11-slim-bookworm AS base
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin cgan
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
STOPSIGNAL SIGTERM


# Writes to volumes alone: data sets to /data, runs and judges to runs, artifacts to weights.
FROM base AS training
LABEL org.opencontainers.image.title="cgan-training" \
      org.opencontainers.image.description="Trains class-conditional image generators" \
      org.opencontainers.image.version="0.1.0"
RUN install -d -o cgan -g cgan /data runs
COPY --from=training-packages /opt/venv /opt/venv
# Readable by the image's user, however strict the umask of the checkout was.
COPY --chmod=755 --chown=10001:10001 weights/*.safetensors weights/
COPY --chmod=755 training training
ENV CGAN_DATA_DIR=/data \
    XDG_CACHE_HOME=/app/runs/cache
USER 10001:10001
ENTRYPOINT ["python", "-m", "training"]
CMD ["--help"]
ARG SOURCE=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.source=$SOURCE \
      org.opencontainers.image.revision=$REVISION


FROM base AS service
LABEL org.opencontainers.image.title="cgan-service" \
      org.opencontainers.image.description="Labelled synthetic images on demand, over HTTP" \
      org.opencontainers.image.version="0.1.0"
COPY --from=service-packages /opt/venv /opt/venv
COPY --chmod=755 --chown=10001:10001 weights/*.safetensors weights/
COPY --chmod=755 training training
COPY --chmod=755 service service
ENV CGAN_HOST=0.0.0.0 \
    CGAN_PORT=8000
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['CGAN_PORT']), 4); c.request('GET', '/livez'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "service"]
ARG SOURCE=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.source=$SOURCE \
      org.opencontainers.image.revision=$REVISION
