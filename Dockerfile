# keye on a processor: `docker build -t keye . && docker run --rm -p 127.0.0.1:8000:8000 -e KEYE_API_KEY=... keye`
FROM python:3.12-slim

# A compiler for the fast kernels, which are built for the machine that runs them.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 keye

WORKDIR /app
# Dependencies come first, in a layer that a change of the sources does not rebuild.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src/keye/version.py src/keye/version.py
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url "$TORCH_INDEX" '.[serve]'
COPY src src
RUN pip install --no-cache-dir --no-deps --force-reinstall .

# Nothing in the container runs as root, and only the home folder (caches, uploads) is written to.
USER 10001
ENV HOME=/home/keye TMPDIR=/home/keye OMP_WAIT_POLICY=PASSIVE

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# Beyond loopback the server wants a key: KEYE_API_KEY, or --api-key-file with a mounted file.
ENTRYPOINT ["keye", "serve"]
CMD ["nano", "--host", "0.0.0.0", "--port", "8000"]
