"""The cluster files, as far as they can be checked without a cloud, a Kubernetes server or a Docker daemon."""

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import arae

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "cluster" / "files"
AWS, DOCKERFILE = FILES / "ray-cluster-aws.yaml", FILES / "Dockerfile"
KUBERAY = [FILES / f"kuberay-{name}.yaml" for name in ("shared", "cluster", "job")]
PLACEHOLDER = re.compile(r"REPLACE_[A-Z0-9_]*[A-Z0-9]")

# Fields of the operator's types (ray.io/v1 as of KubeRay 1.5): those that the files may use.
CLUSTER = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
HEAD = {"serviceType", "rayStartParams", "template"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
JOB = {
    "submissionMode", "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
    "submitterPodTemplate", "rayClusterSpec",
}  # fmt: skip
IN_BASE_IMAGE = {"python3-venv", "python3-dev"}
FOR_CLUSTERS = {"openssh-client", "rsync", "wget"}


def pinned(name: str) -> str:
    found = re.search(rf"^{name}==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert found, f"{name} is not pinned"
    return found[1]


def setup_list(name: str) -> set[str]:
    """`packages` or `extras` of .ci/setup."""
    text = (ROOT / ".ci" / "setup").read_text()
    found = re.search(rf"^{name}=\(?([^)\n]*)\)?$", text, re.M)
    assert found, f".ci/setup has no {name}"
    return set(re.split(r"[ ,]", found[1]))


def documents() -> list[dict[str, Any]]:
    return [document for path in KUBERAY for document in yaml.safe_load_all(path.read_text())]


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [each for each in documents() if each["kind"] == kind]
    return found


def clusters() -> list[dict[str, Any]]:
    """The specification of the standing cluster, and that of the job's."""
    return [of_kind("RayCluster")["spec"], of_kind("RayJob")["spec"]["rayClusterSpec"]]


def templates() -> Iterator[tuple[str, dict[str, Any]]]:
    for index, spec in enumerate(clusters()):
        yield f"head {index}", spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield f"{group['groupName']} {index}", group["template"]
    yield "submitter", of_kind("RayJob")["spec"]["submitterPodTemplate"]


@pytest.mark.parametrize("path", [AWS, *KUBERAY, FILES / "slurm.sh"], ids=lambda path: path.name)
def test_a_file_says_what_to_replace_and_holds_no_secret(path: Path) -> None:
    lines = path.read_text().splitlines()
    said = set(PLACEHOLDER.findall("\n".join(line for line in lines if line.startswith("#"))))
    used = set(PLACEHOLDER.findall("\n".join(line for line in lines if not line.startswith("#"))))
    assert said == used
    assert not re.search(r"\b[0-9a-f]{32,}\b|\bAKIA[0-9A-Z]{16}\b|PRIVATE KEY", path.read_text())
    assert "Not run:" in path.read_text()


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    made = prepare_config(copy.deepcopy(config))
    validate_config(made)
    return made


def test_ray_takes_the_file_for_aws() -> None:
    config = yaml.safe_load(AWS.read_text())
    made = prepared(config)
    types = made["available_node_types"]
    assert types["head"]["max_workers"] == 0
    assert types["head"]["resources"] == {"CPU": 0}
    assert {name: t["node_config"]["InstanceType"].split(".")[0] for name, t in types.items() if name != "head"} == {
        "a100": "p4d",
        "a100-spot": "p4d",
        "v100-spot": "p3",
    }
    for name, one in types.items():
        node = one["node_config"]
        assert (node.get("InstanceMarketOptions") == {"MarketType": "spot"}) == name.endswith("-spot")
        # Without a group of the file's own Ray makes one that is open to the world on port 22.
        assert node["SecurityGroupIds"] == ["REPLACE_SG"]
        assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert None not in [value for t in types.values() for value in t["node_config"].values()], "boto3 refuses None"
    options = made["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    (mounted,) = made["file_mounts"]
    assert f"--env RAY_AUTH_TOKEN_PATH={mounted}/auth_token" in options
    (head,) = [line for line in made["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in head
    assert made["idle_timeout_minutes"] > 0


@pytest.mark.parametrize(
    "change",
    [{"idle_timeout": 5}, {"max_workers": -1}, {"head_node_type": "heads"}, {"docker": {"image": "x"}}],
    ids=str,
)
def test_rays_check_of_the_file_can_fail(change: dict[str, Any]) -> None:
    import jsonschema

    config = yaml.safe_load(AWS.read_text()) | change
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError)):
        prepared(config)


def test_the_operator_knows_every_field() -> None:
    job = of_kind("RayJob")["spec"]
    assert set(job) <= JOB
    assert job["submissionMode"] == "K8sJobMode"
    for spec in clusters():
        assert set(spec) <= CLUSTER
        assert set(spec["headGroupSpec"]) <= HEAD
        assert spec["rayVersion"] == pinned("ray")
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
        for group in spec["workerGroupSpecs"]:
            assert set(group) <= GROUP
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            parameters = [group["rayStartParams"], spec["headGroupSpec"]["rayStartParams"]]
            assert all(isinstance(value, str) for each in parameters for value in each.values())
    assert {each["apiVersion"] for each in documents() if each["kind"].startswith("Ray")} == {"ray.io/v1"}


@pytest.mark.parametrize(("name", "template"), list(templates()), ids=[name for name, _ in templates()])
def test_kubernetes_knows_every_field_of_a_pod(name: str, template: dict[str, Any]) -> None:
    """kubectl decodes a pod into its own types without a server, and what these do not have is lost on the way."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    spec = template["spec"]
    spec = spec | {"containers": [container | {"image": "checked"} for container in spec["containers"]]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"] | {"name": "a"}, "spec": spec}
    given = pod | {"spec": spec | {"containers": [container | {"image": "a"} for container in spec["containers"]]}}
    assert lost(pod, decode(given)) == []
    if name == "submitter":  # the check can fail
        unknown = given | {"spec": given["spec"] | {"nodeSelectors": {}}}
        assert lost(unknown["spec"], decode(unknown)["spec"] | {"containers": given["spec"]["containers"]}) == [
            "nodeSelectors"
        ]


def decode(pod: dict[str, Any]) -> dict[str, Any]:
    """The pod as Kubernetes' own type holds it, its images replaced by `checked`."""
    command = ["kubectl", "set", "image", "--local", "-f", "-", "-o", "json", "*=checked"]
    done = subprocess.run(command, input=json.dumps(pod), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def lost(given: Any, kept: Any, where: str = "") -> list[str]:
    """Paths of what is in `given` and not in `kept`; null and empty count as nothing."""
    if isinstance(given, dict):
        here = [f"{where}.{key}".lstrip(".") for key in given if key not in kept]
        return here + [x for k in given if k in kept for x in lost(given[k], kept[k], f"{where}.{k}".lstrip("."))]
    if isinstance(given, list):
        pairs = zip(given, kept, strict=True)
        return [x for i, (one, other) in enumerate(pairs) for x in lost(one, other, f"{where}[{i}]")]
    return [] if str(given) == str(kept) else [where]


@pytest.mark.parametrize(("name", "template"), list(templates()), ids=[name for name, _ in templates()])
def test_a_pod_is_bounded_and_unprivileged(name: str, template: dict[str, Any]) -> None:
    spec = template["spec"]
    # The network policy finds pods by this label, and would leave others out.
    label = of_kind("NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    assert template["metadata"]["labels"].items() >= label.items()
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == int(re.findall(r"^USER (\d+)$", DOCKERFILE.read_text(), re.M)[-1])
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in spec["containers"]:
        assert container["image"] == f"REPLACE_REGISTRY/{image_tag()}"
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        expected = {"gcs-server": 6379, "dashboard": 8265, "client": 10001} if name.startswith("head") else {}
        assert ports == expected
        assert not [each for each in container.get("env", []) if "TOKEN" in each["name"]], "a token in the open"
    gpus = [container["resources"]["limits"].get("nvidia.com/gpu") for container in spec["containers"]]
    if name.startswith(("a100", "v100")):
        assert int(gpus[0]) > 0
        assert name[:4].upper() in spec["nodeSelector"]["nvidia.com/gpu.product"]
        keys = {toleration["key"] for toleration in spec["tolerations"]}
        assert ("cloud.google.com/gke-spot" in keys) == ("spot" in name)
    else:
        assert gpus == [None]


def test_the_job_is_a_command_that_arae_accepts() -> None:
    from arae.cli import app
    from arae.config import load_recipe

    words = shlex.split(of_kind("RayJob")["spec"]["entrypoint"])
    assert words[:2] == ["arae", "train"]
    train = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    given = train.make_context("train", words[2:]).params
    recipe = load_recipe(given["recipe"], given["overrides"])
    (group,) = clusters()[1]["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert int(given["workers"]) == gpus * group["replicas"]
    assert given["address"] == "auto"
    parts = [recipe.encoder, recipe.decoder]
    assert all(part.batch // part.micro >= int(given["workers"]) for part in parts if part)
    shared = "/shared/"
    assert all(path.startswith(shared) for path in (recipe.data.train, recipe.data.test) if path)


def test_what_is_shared_is_what_the_pods_use() -> None:
    claim, policy = of_kind("PersistentVolumeClaim"), of_kind("NetworkPolicy")
    assert set(claim["spec"]) == {"accessModes", "storageClassName", "resources"}
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    claimed = [
        v["persistentVolumeClaim"]["claimName"] for _, t in templates() for v in t["spec"].get("volumes", [])[:1]
    ]
    assert set(claimed) == {claim["metadata"]["name"]}
    assert set(policy["spec"]) == {"podSelector", "policyTypes", "ingress"}
    own, operator = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": policy["spec"]["podSelector"]}]}
    assert operator["ports"] == [{"port": 8265, "protocol": "TCP"}]


def image_tag() -> str:
    (default,) = re.findall(r"^ARG CUDA=(\S+)$", DOCKERFILE.read_text(), re.M)
    return f"arae:{arae.__version__}-{default}"


def test_the_image_holds_what_setup_installs() -> None:
    text = DOCKERFILE.read_text()
    assert f"-t {image_tag()} " in text
    (listed,) = re.findall(r"apt-get install [^\n]*\\\n((?:[^&]*\\\n)+)", text)
    assert set(listed.replace("\\", " ").split()) - FOR_CLUSTERS == setup_list("packages") - IN_BASE_IMAGE
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.M)
    assert set(extras.split(",")) == setup_list("extras") - {"dev"} | {"deepspeed"}
    users = re.findall(r"^USER (\S+)$", text, re.M)
    assert users
    assert users[-1] not in ("0", "root")
    kept = {line[1:] for line in (FILES / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY --\S+ (.*)$", text, re.M) for word in line.split()[:-1]}
    for source in copied:
        assert (ROOT / source).exists()
        assert source.split("/")[0] in kept, f"{source} is not sent to the builder"


def test_torch_for_v100_is_the_pinned_one_in_its_last_build() -> None:
    lines = (FILES / "constraints-cu126.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins == {name: f"{pinned(name)}+cu126" for name in ("torch", "torchvision")}
    assert tuple(map(int, pinned("torch").split(".")[:2])) < (2, 15)


@pytest.mark.parametrize(
    "command", [["hadolint", str(DOCKERFILE)], ["shellcheck", str(FILES / "slurm.sh")]], ids=["hadolint", "shellcheck"]
)
def test_linters_find_nothing(command: list[str]) -> None:
    program = shutil.which(command[0], path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if not program:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
