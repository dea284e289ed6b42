"Inputs of the kinds that faults were found on in real data (cases.md): what was meant is read, or the row is refused with its reason."
import numpy as np, pytest
from PIL import Image
from mammo_nb.core import DataError, ParameterError
from mammo_nb.data.folder import read_folder
from mammo_nb.data.lookalike import write_dicom
from mammo_nb.data.patches import extract, healthy_patches
from mammo_nb.data.phantom import phantom_patient, scanned
from mammo_nb.data.pixels import breast_mask, read_header, read_image
from mammo_nb.data.table import make_data
from mammo_nb.data.terms import TERMS, check_release

BOXES = "image_id,x0,y0,x1,y1,lesion_type,label\n"


def folder(path, images, lesions, size=(600, 400)):
    for k,n in enumerate("ab"): Image.fromarray(np.add.outer(np.arange(size[0])//8, np.full(size[1], k)).astype(np.uint8)).save(path/f"{n}.png")
    (path/"images.csv").write_text(images)
    (path/"lesions.csv").write_text(lesions)
    return read_folder(path, name="m")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("images", [
    "image_id,patient_id,path,normal\na,1,a.png,1\na,1,a.png,0\nb,2,b.png,\n",                 # two rows, two answers
    "image_id,patient_id,path,normal\na,1,b.png,1\nb,2,b.png,\n",                              # one file under two ids
    "image_id,patient_id,path,BI-RADS\na,1,a.png,5\nb,2,b.png,4\n",
    "image_id,patient_id,path,Assessment\na,1,a.png,4\nb,2,b.png,4\n",
    "image_id,patient_id,path,Diagnose\na,1,a.png,Karzinom\nb,2,b.png,\n",
    "image_id,patient_id,path,diagnóstico,normal\na,1,a.png,maligno,1\nb,2,b.png,,\n",
    "image_id,patient_id,path,tumour\na,1,a.png,yes\nb,2,b.png,\n",
    "image_id,patient_id,path,laterality\na,007,a.png,L\nb,7,b.png,L\n"])                      # a spreadsheet cut the zeros
def test_what_speaks_against_health_is_heard(tmp_path, images):
    d = folder(tmp_path, images, BOXES+"b,110,120,150,160,mass,benign\n")
    assert not d.images.set_index("image_id").normal["m:a"] and (d.skipped.kind == "unknown").any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row, words", [
    ("1.020,1.200,1.800,2.100", "thousands"),
    ("500,900,5000,6000", "another size"), ('"1,020","1,200","1,800","2,100"', "may be two"), (".2,.3,.4,.5", "fractions"), ("20%,30%,50%,60%", "no number")])
def test_boxes_that_are_no_pixels_are_refused(tmp_path, row, words):
    d = folder(tmp_path, "image_id,patient_id,path\na,1,a.png\nb,2,b.png\n", BOXES+f"a,{row},mass,benign\n", size=(1200, 960))
    assert not len(d.lesions) and any(words in r for r in d.skipped.reason) and d.images.has_lesion[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", ["a,20,30,50,60,mass,benign\nb,10,70,40,95,mass,benign\n", "a,20.5,30.1,50.2,60,mass,benign\nb,1,2,30,40,mass,benign\n",
                                  "a,50.2,70.4,80.1,99.3,mass,benign\nb,10.2,20.4,30.5,40.1,mass,benign\n"])
def test_boxes_that_all_lie_in_the_corner_are_no_pixels(tmp_path, rows):
    "Per cent and millimetres do not say so in a number; a whole table does. A single box is taken and noted."
    d = folder(tmp_path, "image_id,patient_id,path\na,1,a.png\nb,2,b.png\n", BOXES+rows, size=(1200, 960))
    assert not len(d.lesions) and any("per cent" in r for r in d.skipped.reason) and d.images.has_lesion.all()
    (tmp_path/"lesions.csv").write_text(BOXES + rows.splitlines()[0] + "\n")
    one = read_folder(tmp_path)
    assert len(one.lesions) == 1 and any("taken as pixels" in r for r in one.skipped.reason)


@pytest.mark.filterwarnings("ignore")
def test_rows_that_contradict(tmp_path):
    images = "image_id,patient_id,path\na,1,a.png\nb,2,b.png\n"
    d = folder(tmp_path, images, BOXES+"a,110,120,150,160,mass,benign\na,110,120,150,161,mass,malignant\nb,110,120,150,160,mass,benign\nb,110,120,150,160,mass,benign\n")
    assert d.lesions.image_id.tolist() == ["m:b"] and any("benign and malignant" in r for r in d.skipped.reason)
    d = folder(tmp_path, images, "image_id,patient_id,x0,y0,x1,y1\na,2,110,120,150,160\n")
    assert not len(d.lesions) and not d.images.normal.any()


@pytest.mark.filterwarnings("ignore")
def test_masks_of_several_forms(tmp_path):
    m = np.zeros((600, 400), np.uint8)
    m[100:150, 200:260] = 1
    m[300:320, 20:60] = 2
    painted = Image.fromarray(m, mode="P")
    painted.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    painted.save(tmp_path/"mask.png")
    Image.fromarray(255*np.uint8(m == 1)).save(tmp_path/"one.png")
    Image.fromarray(255*np.uint8(m == 2)).save(tmp_path/"two.png")
    Image.fromarray(255*np.uint8(m == 0)).save(tmp_path/"turned.png")
    rows = "a,1,mask.png,2\na,2,one.png,\na,2,two.png,\nb,1,turned.png,\n"
    d = folder(tmp_path, "image_id,patient_id,path\na,1,a.png\nb,2,b.png\n", "image_id,lesion_id,mask_path,mask_value\n"+rows)
    assert d.lesions[["x0", "y0", "x1", "y1"]].values.tolist() == [[20, 300, 60, 320], [20, 100, 260, 320]]
    assert any("marks 98% of its image" in r for r in d.skipped.reason)


def test_strict_windows_lie_on_breast(tmp_path):
    "On a film with a bright base, labels and tape the papers' rule takes label for tissue; with `min_breast` no window does."
    images, views = [], {}
    for i in range(2):
        for v in phantom_patient(i, seed=0, scale=.1)[1][:2]:
            name = f"m:{i}{v.view}"
            film = np.uint8(255*scanned(v, "everything", seed=i).pixels)
            Image.fromarray(film).save(tmp_path/f"{name[2:]}.png")
            views[name] = v
            images.append(dict(image_id=name, patient_id=f"m:{i}", path=str(tmp_path/f"{name[2:]}.png"), rows=film.shape[0], cols=film.shape[1],
                               laterality=v.side, view=v.view, normal=True))
            assert (breast_mask(film) & v.mask).sum()*2/(breast_mask(film).sum()+v.mask.sum()) > .92
    data = make_data("m", images, [])
    share = lambda t: np.array([views[r.image_id].mask[int(r.y0):int(r.y1), int(r.x0):int(r.x1)].mean() for r in t.itertuples()])
    how = dict(side="fixed", seed=0, min_side=40, zoom=(0, 0), shift=0)
    plain, strict = (extract(healthy_patches(data, 40, min_breast=b, **how), size=16, folder=tmp_path/f"{b}").table for b in (0., .5))
    assert (share(plain) < .1).any() and share(strict).min() > .45 and (strict.breast >= .5).all()


def test_terms_stop_an_export():
    for name,t in TERMS.items():
        if t.release != "permission": check_release([name], "cc-by-nc-4.0")
        else:
            with pytest.raises(ParameterError, match="the terms of"): check_release(["phantom", name], "mit")
            assert check_release(["phantom", name], "mit", permission="a letter")[0]["dataset"] == name


def test_a_word_of_no_known_kind_in_a_header(tmp_path):
    "Found by the fuzz: pydicom raises NotImplementedError where a tag's kind is none; size and pixels may not be read then."
    path = write_dicom(tmp_path/"a.dcm", np.arange(4096, dtype=np.uint16).reshape(64, 64), PresentationIntentType="FOR PRESENTATION")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\x08\x00\x68\x00CS", b"\x08\x00\x68\x00KS"))
    assert path.read_bytes() != whole
    for read in (read_image, read_header):
        with pytest.raises(DataError, match="broken DICOM header"): read(path)
