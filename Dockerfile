# One image for both services of docker-compose.yml. PyTorch's wheel on amd64 Linux is the CUDA build,
# which a GPU host needs; api-cpu runs the same one and only leaves its CUDA part idle.

# The dependencies alone, so that no other change of pyproject.toml or the code installs them again.
FROM python:3.11-slim-bookworm AS requirements
COPY pyproject.toml .
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt


# Every dependency has a wheel: nothing is compiled, here or later.
FROM python:3.11-slim-bookworm AS build
COPY --from=requirements requirements.txt /tmp/
RUN python -m venv --without-pip /opt/venv \
    && python -m pip --python /opt/venv/bin/python install --no-cache-dir --only-binary :all: -r /tmp/requirements.txt


FROM python:3.11-slim-bookworm

LABEL org.opencontainers.image.title="cgan-service" \
      org.opencontainers.image.description="Labelled synthetic images on demand, over HTTP"

RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin cgan

COPY --from=build /opt/venv /opt/venv

# Readable by the service's user, however strict the umask of the checkout was.
WORKDIR /app
COPY --chmod=755 weights/*.safetensors weights/
COPY --chmod=755 training training
COPY --chmod=755 service service

# Nothing is written at run time.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    CGAN_HOST=0.0.0.0 \
    CGAN_PORT=8000

USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['CGAN_PORT']), 4); c.request('GET', '/livez'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "service"]
