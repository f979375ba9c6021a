# Three images: `service`, which is the last stage and so the default, for machines with an NVIDIA
# GPU; `service-cpu` without PyTorch; and `training`.
# PyTorch's wheel for amd64 Linux is the CUDA build. It also runs on machines without a GPU.

# Only the dependencies, so that other changes of pyproject.toml do not install them again.
FROM python:3.11-slim-bookworm AS requirements
WORKDIR /srv
COPY pyproject.toml .
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    open('service.txt', 'w').write('\n'.join(project['dependencies'])); \
    extras = project['optional-dependencies']; \
    [open(f'{name}.txt', 'w').write('\n'.join(extras[name])) for name in ('gpu', 'train')]"


# Every dependency has a wheel, so no stage compiles anything.
FROM python:3.11-slim-bookworm AS service-cpu-packages
COPY --from=requirements /srv/service.txt /tmp/
RUN python -m venv --without-pip /opt/venv \
    && python -m pip --python /opt/venv/bin/python install --no-cache-dir --only-binary :all: -r /tmp/service.txt


FROM service-cpu-packages AS service-packages
COPY --from=requirements /srv/gpu.txt /tmp/
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir --only-binary :all: -r /tmp/gpu.txt


FROM service-packages AS training-packages
COPY --from=requirements /srv/train.txt /tmp/
RUN python -m pip --python /opt/venv/bin/python install --no-cache-dir --only-binary :all: -r /tmp/train.txt


# The project without its dependencies, installed for its metadata: the version stands there.
# The models are copied to /app/weights below, where a volume can take their place.
FROM python:3.11-slim-bookworm AS project
WORKDIR /srv/source
COPY . .
RUN python -m pip install --no-cache-dir --no-deps --target /srv/app . \
    && rm -r /srv/app/service/weights /srv/app/bin


FROM python:3.11-slim-bookworm AS base
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin cgan
WORKDIR /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
STOPSIGNAL SIGTERM


# Writes only to volumes: data sets to /data, runs and classifiers to runs, artifacts to weights.
FROM base AS training
LABEL org.opencontainers.image.title="cgan-training" \
      org.opencontainers.image.description="Trains class-conditional image generators"
RUN install -d -o cgan -g cgan /data runs
COPY --from=training-packages /opt/venv /opt/venv
# The mode keeps files readable for the image's user if the checkout had a strict umask.
COPY --chmod=755 --chown=10001:10001 weights/*.safetensors weights/
COPY --from=project /srv/app .
ENV CGAN_DATA_DIR=/data \
    XDG_CACHE_HOME=/app/runs/cache
USER 10001:10001
ENTRYPOINT ["python", "-m", "training"]
CMD ["--help"]
ARG SOURCE=unknown
ARG REVISION=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.source=$SOURCE \
      org.opencontainers.image.revision=$REVISION \
      org.opencontainers.image.version=$VERSION


FROM base AS serving
LABEL org.opencontainers.image.title="cgan-service" \
      org.opencontainers.image.description="Labelled synthetic images on demand, over HTTP"
ENV CGAN_HOST=0.0.0.0 \
    CGAN_PORT=8000
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['CGAN_PORT']), 4); c.request('GET', '/livez'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "service"]


FROM serving AS service-cpu
COPY --from=service-cpu-packages /opt/venv /opt/venv
COPY --chmod=755 --chown=10001:10001 weights/*.safetensors weights/
COPY --from=project /srv/app .
ARG SOURCE=unknown
ARG REVISION=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.source=$SOURCE \
      org.opencontainers.image.revision=$REVISION \
      org.opencontainers.image.version=$VERSION


FROM serving AS service
COPY --from=service-packages /opt/venv /opt/venv
COPY --chmod=755 --chown=10001:10001 weights/*.safetensors weights/
COPY --from=project /srv/app .
ARG SOURCE=unknown
ARG REVISION=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.source=$SOURCE \
      org.opencontainers.image.revision=$REVISION \
      org.opencontainers.image.version=$VERSION
